"""A passphrase that is to come from systemd, in a service and outside of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from blocksnap.cli.passphrases import CURRENT
from blocksnap.config import RepositorySettings
from blocksnap.errors import PassphraseError

CONFIGURED = RepositorySettings.model_validate({"url": "/r", "passphrase_credential": "shop"})


@pytest.fixture(autouse=True)
def nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("INVOCATION_ID", "CREDENTIALS_DIRECTORY", "BLOCKSNAP_PASSPHRASE"):
        monkeypatch.delenv(name, raising=False)


def test_the_credential_that_is_configured_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "shop").write_text("secret\n")
    (tmp_path / "blocksnap.passphrase").write_text("the usual one\n")
    assert CURRENT.find(None, configured=CONFIGURED) == b"secret"
    (tmp_path / "shop").unlink()
    assert CURRENT.find(None, configured=CONFIGURED) == b"the usual one"
    assert CURRENT.find(None) == b"the usual one"


@pytest.mark.parametrize("command", ["false", "no-such-program"])
def test_a_command_that_gives_none_is_named(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("BLOCKSNAP_PASSPHRASE_COMMAND", command)
    with pytest.raises(PassphraseError, match=f"^BLOCKSNAP_PASSPHRASE_COMMAND: {command} "):
        CURRENT.find(None)


def test_a_credential_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CURRENT.find(None) is None
    with pytest.raises(PassphraseError, match=r"credential of systemd \(shop\), and this is none of its"):
        CURRENT.find(None, configured=CONFIGURED)
    monkeypatch.setenv("INVOCATION_ID", "6227")
    with pytest.raises(PassphraseError, match="systemd has given this service no credential shop") as missing:
        CURRENT.find(None, configured=CONFIGURED)
    assert "LoadCredentialEncrypted=shop:FILE" in str(missing.value.resolution)
