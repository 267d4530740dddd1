"""Prints pip's configuration as exports of uv's environment variables; uv does not read pip's configuration.

    eval "$(python deploy/uv_settings.py)"

Settings are merged as pip merges them: `[install]` over `[global]`, and PIP_* variables over both.
"""

import ast
import shlex
import subprocess
import sys

VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "constraint": "UV_CONSTRAINT",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "proxy": "ALL_PROXY",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}
SECTIONS = ("global", "install", ":env:")
"""By rising precedence."""


def exports(listing: str) -> dict[str, str]:
    """Return uv's variables for the lines of `pip config list`, such as `global.index-url='https://...'`."""
    by_section: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in by_section and name in VARIABLES:
            by_section[section][VARIABLES[name]] = _joined(VARIABLES[name], str(ast.literal_eval(value)))
    # pip searches all indexes for a version; uv by default stops at the first index that has the package.
    return {"UV_INDEX_STRATEGY": "unsafe-best-match"} | {k: v for s in SECTIONS for k, v in by_section[s].items()}


def _joined(variable: str, value: str) -> str:
    """Join a list: pip separates items by spaces or newlines, uv by commas in find-links."""
    return ("," if variable == "UV_FIND_LINKS" else " ").join(value.split())


if __name__ == "__main__":
    result = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in exports(result.stdout).items()))
