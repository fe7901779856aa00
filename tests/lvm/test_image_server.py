# SPDX-License-Identifier: Apache-2.0
"""A network block device is taken over from a server that is dying still, as a killed process leaves it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blocksnap.errors import BlocksnapError
from blocksnap.restore.image_server import ImageServer
from blocksnap.restore.keeper import Keeper
from blocksnap.system import nbd
from blocksnap.system.command import has_program, run
from blocksnap.system.nbdkit import serve_connection
from support.require import require
from support.standing import wait_until

IDENTIFIER = "blocksnap-test-image-server"


@pytest.mark.usefixtures("_lab")
def test_the_end_of_the_server_before_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says that it has taken the new one also where it has not."""
    require("nbdkit", has_program("nbdkit"), "needs nbdkit")
    image, said = tmp_path / "image", list[BlocksnapError]()
    image.write_bytes(os.urandom(1 << 20))
    run("modprobe", "nbd", "nbds_max=1")
    with Keeper() as keeper:
        server = ImageServer(str(image), IDENTIFIER, keeper, said.append)
        before, ours, its = serve_connection(str(image))
        its.close()
        with ours:
            index = nbd.connect(ours, *nbd.shake_hands(ours), IDENTIFIER)
        offer, offered = server._offer, list[int | None]()

        def offering() -> int | None:
            offered.append(offer())
            # It dies when it has been found that the kernel still has its connection, and no sooner.
            before.kill()
            return offered[-1]

        monkeypatch.setattr(server, "_offer", offering)
        try:
            server.start()
            assert (offered[0], offered[-1]) == (None, index)
            assert Path(f"/dev/nbd{index}").read_bytes() == image.read_bytes()
            # It was not that one which the kernel did not take.
            assert said == []
        finally:
            before.close()
            server.close()
            if (left := nbd.find(IDENTIFIER)) is not None:
                nbd.disconnect(left)
    # Who looks at new devices may have it open for a moment yet.
    assert wait_until(lambda: nbd.find(IDENTIFIER) is None)
