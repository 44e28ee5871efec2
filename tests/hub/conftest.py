from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from hub_server import HubServer
from huggingface_hub import constants, file_download, hf_api
from huggingface_hub.utils import _http

from deit_models.hub import fetch

PREFIXES = ("HF_", "HUGGING", "TRANSFORMERS_")
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ftp_proxy")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    _put(monkeypatch, fetch, RETRY_DELAY_S=0.001)


@dataclass
class HubEnv:
    """The client's view of the world in one test: this process and, by the environment, processes started from it."""

    server: HubServer
    home: Path
    cache: Path
    _monkeypatch: pytest.MonkeyPatch

    def login(self, token: str | None = None) -> None:
        self._monkeypatch.setenv("HF_TOKEN", token or self.server.token)

    def logout(self) -> None:
        self._monkeypatch.delenv("HF_TOKEN", raising=False)

    def go_offline(self, offline: bool = True) -> None:
        self._monkeypatch.setenv("HF_HUB_OFFLINE", str(int(offline)))
        _put(self._monkeypatch, constants, HF_HUB_OFFLINE=offline)

    def blobs(self) -> list[Path]:
        """Every complete file in the cache."""
        return sorted(path for path in self.cache.glob("models--*/blobs/*") if path.suffix != ".incomplete")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "hub_env" in getattr(item, "fixturenames", ()):  # huggingface_hub's own uploads of weight files, 1.x and 2.x
            item.add_marker(pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"))


@pytest.fixture
def hub_server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def hub_env(hub_server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubEnv]:
    """Point the client at `hub_server`: empty cache, no token, no proxy, waits between retries of 5 ms at most."""
    home = tmp_path / "hf_home"
    home.mkdir()
    _set_environment(monkeypatch, hub_server, home)
    _set_frozen_constants(monkeypatch, hub_server, home)
    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: time.sleep(min(seconds, 0.005))})
    for module in (_http, file_download):
        _put(monkeypatch, module, time=impatient)
    huggingface_hub.close_session()
    yield HubEnv(hub_server, home, home / "hub", monkeypatch)
    huggingface_hub.close_session()


def _set_environment(monkeypatch: pytest.MonkeyPatch, server: HubServer, home: Path) -> None:
    """For processes that the test starts, and for what the client reads when it is used."""
    for name in list(os.environ):
        if name.startswith(PREFIXES) or name.lower() in PROXIES:
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(home))
    for flag in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_XET"):
        monkeypatch.setenv(flag, "1")


def _set_frozen_constants(monkeypatch: pytest.MonkeyPatch, server: HubServer, home: Path) -> None:
    """The same, for what the client read from the environment when it was imported (huggingface_hub 1.x and 2.x)."""
    harnesses = home / ".agent_harnesses.json"  # fresh, or the client asks the server for it once a day
    harnesses.write_text(json.dumps({"standardEnvVars": [], "harnesses": {}}), encoding="utf-8")
    frozen = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HUGGINGFACE_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_XET_CACHE": str(home / "xet"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(harnesses),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "HF_HUB_DOWNLOAD_TIMEOUT": 10,
        "HF_HUB_ETAG_TIMEOUT": 10,
    }
    _put(monkeypatch, constants, **frozen)
    copies = {
        "utils._cache_assets": {"HF_ASSETS_CACHE": str(home / "assets")},
        "utils._detect_agent": {"_registry": None},
        "utils.tqdm": {"HF_HUB_DISABLE_PROGRESS_BARS": True},
    }
    for module, values in copies.items():
        if f"huggingface_hub.{module}" in sys.modules:
            _put(monkeypatch, sys.modules[f"huggingface_hub.{module}"], **values)
    _put(monkeypatch, hf_api.api, endpoint=server.url)  # made at import, behind the module's functions


def _put(monkeypatch: pytest.MonkeyPatch, place: object, **values: object) -> None:
    """For one test, other values for what a module or object read when it was imported or made."""
    for name, value in values.items():
        monkeypatch.setattr(place, name, value, raising=False)
