"""Bring the data of an instant restore to its volume, which is used meanwhile, and make that LVM's own.

The order of steps, and what holds between any two of them, is in docs/design.md, section 6.5.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from blocksnap.controller.arriving import Arrival, ArrivalFile
from blocksnap.controller.pacing import TokenBucket
from blocksnap.errors import BlocksnapError, StorageError, TargetError, VolumeError
from blocksnap.operations.images import IMAGES_FOLDER, served_images
from blocksnap.operations.label import tell_of_labels
from blocksnap.operations.reporting import Reporter, each_once, phase
from blocksnap.operations.restore import LostRangeError
from blocksnap.operations.targets import RestoreDiffersError, read_runs, verify_target
from blocksnap.pipeline.flow import Geometry
from blocksnap.pipeline.selection import Ranges
from blocksnap.repository.blockmap import MapReader
from blocksnap.repository.documents import Backup
from blocksnap.repository.repository import Repository
from blocksnap.restore.arrival_devices import ArrivalDevices, Names, below_table
from blocksnap.restore.arrival_errors import PartGoneError, VolumeShrunkError
from blocksnap.restore.arriving_target import ArrivingTarget
from blocksnap.restore.engine import UnreadableRangeError, head_bytes, restore_to_target
from blocksnap.restore.exception_store import store_bytes
from blocksnap.restore.image_server import ImageServer
from blocksnap.restore.keeper import Keeper
from blocksnap.restore.pool_watch import PoolFillingError, RestoreLimits
from blocksnap.restore.record import RestoreRecord
from blocksnap.restore.targets import may_go_on
from blocksnap.system import nbd

_AGAIN_SECONDS = 2.0
_TARGET_AGAIN_SECONDS = 10.0
_WRITES_SECONDS = 5.0
"""How often it is asked whether what is written meanwhile is still taken."""
_ANSWER_SECONDS = 60.0
"""How long those may take who are answered from the volume: it is local."""


@dataclass(frozen=True, slots=True)
class InstantResult:
    """What was done: the device, and after how many seconds it could be used and was whole."""

    device: str
    backup: str
    volume_bytes: int
    usable_seconds: float
    seconds: float
    verified: bool


def _names_of(arrival: Arrival) -> Names:
    return Names(
        arrival.device,
        arrival.below,
        arrival.group,
        arrival.name,
        arrival.arriving,
        arrival.meanwhile,
    )


def discard(arrival: Arrival, file: ArrivalFile) -> None:
    """Remove everything of a restore; raises DeviceBusyError while it is used."""
    index = nbd.find(arrival.token)
    if index is not None:
        # Nothing could be removed while something waits for it.
        nbd.disconnect(index)
    ArrivalDevices(_names_of(arrival)).discard()
    file.remove()


def is_all_there(arrival: Arrival) -> bool:
    """Tell whether nobody needs the backup any more, which may have been forgotten.

    Raises VolumeAppearedError where the volume that is there is not the one that is restored.
    """
    if not arrival.has_all:
        ArrivalDevices(_names_of(arrival)).require_name()
    return arrival.has_all


def require_whole(arrival: Arrival) -> None:
    """Raise TargetError where something that had arrived, or what was written meanwhile, was taken away."""
    devices = ArrivalDevices(_names_of(arrival))
    if arrival.stage == "merged":
        devices.require_result()
    if arrival.stage == "whole":
        devices.require_parts()
        devices.open_volumes(arrival.size)
        try:
            devices.require_capacity(arrival.size)
        except VolumeShrunkError as err:
            # What was merged into it already could not be brought again.
            raise PartGoneError(arrival.volume, f"the end of {err.part}", None) from err


def require_store(arrival: Arrival) -> None:
    """Raise TargetError where what was written meanwhile cannot be merged, as far as that can be seen."""
    if arrival.stage == "whole":
        ArrivalDevices(_names_of(arrival)).require_store()


def finish_alone(
    arrival: Arrival, file: ArrivalFile, keeper: Keeper, report: Reporter, began: float
) -> InstantResult:
    """Make a volume that is all there LVM's own, without the repository."""
    try:
        require_whole(arrival)
        if nbd.find(arrival.token) is not None:
            _answer_from_volume(arrival, keeper, report)
        _finish(arrival, file, report, keeper)
    except BaseException:
        _tell_unfinished(arrival, report)
        raise
    return _result(arrival, 0.0, began)


def _answer_from_volume(arrival: Arrival, keeper: Keeper, report: Reporter) -> None:
    """Answer with what has arrived who has waited for a server that is gone, and take its device away.

    Nothing was merged yet: the volume holds just the backup. Raises CommandTimeoutError when they get none.
    """
    devices = ArrivalDevices(_names_of(arrival))
    lv_bytes = devices.open_volumes(arrival.size)
    server = ImageServer(devices.node, arrival.token, keeper, each_once(report))
    try:
        server.start()
        devices.set_below_local(lv_bytes, _ANSWER_SECONDS)
        server.disconnect()
    finally:
        server.close()


def _finish(arrival: Arrival, file: ArrivalFile, report: Reporter, keeper: Keeper) -> None:
    """Bring what was written meanwhile to the volume, which has all else, and make it LVM's own."""
    devices = ArrivalDevices(_names_of(arrival))
    if arrival.stage != "merged":
        lv_bytes = devices.open_volumes(arrival.size)
        devices.mend_store(0)
        devices.set_below_local(lv_bytes)
        report.event("arrived", volume=arrival.volume)
        devices.merge(lv_bytes, keeper)
        file.write(arrival.model_copy(update={"stage": "merged"}))
    devices.hand_over()
    file.remove()


def _tell_unfinished(arrival: Arrival, report: Reporter) -> None:
    waits = ", and reads of what has not arrived wait" if arrival.stage == "arriving" else ""
    report.warn(
        f"{arrival.volume} is not complete{waits}",
        resolution=f"go on: blocksnap restore --instant --resume {arrival.volume}",
    )


def _result(arrival: Arrival, usable_seconds: float, began: float) -> InstantResult:
    device, seconds = f"/dev/{arrival.volume}", time.monotonic() - began
    return InstantResult(device, arrival.backup, arrival.size, usable_seconds, seconds, arrival.verify)


class Bringing:
    """One process's part in an instant restore, from whatever stage it is at."""

    def __init__(
        self,
        repository: Repository,
        backup: Backup,
        arrival: Arrival,
        file: ArrivalFile,
        report: Reporter,
        keeper: Keeper,
        rate: int,
        limits: RestoreLimits,
        began: float,
    ) -> None:
        self._repository = repository
        self._backup = backup
        self._geometry = Geometry(backup.size, backup.chunk_size)
        self._arrival = arrival
        self._file = file
        self._report = report
        self._keeper = keeper
        self._bucket = TokenBucket(rate) if rate else None
        self._limits = limits
        self._first: dict[str, int] = {}
        self._looked = began
        self._lock = threading.Lock()
        self._began = began
        self._usable_seconds = 0.0
        self._devices = ArrivalDevices(_names_of(arrival))
        self._record = RestoreRecord(repository=arrival.repository, backup=backup.id, mode="whole")
        self._told: set[str] = set()

    def bring(self) -> InstantResult:
        """Do what is left to be done."""
        try:
            self._serve_and_fill()
            _finish(self._arrival, self._file, self._report, self._keeper)
        except BaseException:
            if self._arrival.stage == "making":
                discard(self._arrival, self._file)
            else:
                _tell_unfinished(self._arrival, self._report)
            raise
        return _result(self._arrival, self._usable_seconds, self._began)

    def _serve_and_fill(self) -> None:
        """Serve what has not arrived, make the device usable, and bring the rest."""
        lv_bytes = self._devices.open_volumes(self._backup.size)
        image = f"{IMAGES_FOLDER}/{self._backup.id}"
        server = ImageServer(image, self._arrival.token, self._keeper, self._tell)
        with (
            ExitStack() as users,
            served_images(
                self._repository,
                [self._backup],
                self._report,
                end_users=users.close,
                tell=self._tell,
                when_lost=partial(self._lose, server),
                silence=server.silence,
                patient=True,
            ),
        ):
            users.callback(server.close)
            remote = server.start()
            self._open(lv_bytes, remote)
            with self._writes_watched():
                self._fill_or_go_on_serving(lv_bytes, remote)
            self._reach("whole")
            self._devices.set_below_local(lv_bytes)
            server.disconnect()

    def _lose(self, server: ImageServer, reason: str) -> None:
        """Have those wait who read what has not arrived, and tell: the images are not served any more."""
        server.close()
        self._report.warn(
            f"what has not arrived of {self._arrival.volume} is not served, and who reads it waits: {reason}",
            resolution="end this command, and go on: "
            f"blocksnap restore --instant --resume {self._arrival.volume}",
        )

    def _open(self, lv_bytes: int, remote: int) -> None:
        """Make the device that is used, if it is not there."""
        if self._arrival.stage == "making":
            # From here on the volume never looks whole when it is not.
            target = self._target(lv_bytes, remote)
            target.begin()
            target.close()
        if self._arrival.stage == "verifying" and self._devices.capacity() < lv_bytes:
            # Nothing is written down there any more of what has arrived: all of it is brought anew.
            self._reach("arriving")
        if self._arrival.stage == "verifying":
            self._devices.set_below_local(lv_bytes)
        else:
            self._follow_size(lv_bytes)
            self._move(lv_bytes, remote, self._reached())
        # What is written from the next step on is to be kept, whatever happens.
        if self._arrival.stage == "making":
            self._reach("arriving")
        if small := self._devices.mend_store(store_bytes(lv_bytes)):
            self._tell(small)
        device = self._devices.open_top(lv_bytes)
        self._usable_seconds = time.monotonic() - self._began
        tell_of_labels(self._backup, self._report)
        self._report.event(
            "usable",
            device=device,
            volume_bytes=self._backup.size,
            arrived_bytes=self._reached(),
            seconds=round(self._usable_seconds, 3),
        )

    def _fill_or_go_on_serving(self, lv_bytes: int, remote: int) -> None:
        """Bring the data; when that cannot go on, tell, and serve those who use the volume until a signal."""
        try:
            while self._arrival.stage == "arriving" and (pause := self._fill(lv_bytes, remote)):
                time.sleep(pause)
            if self._arrival.verify:
                self._reach("verifying")
                # From here on nobody waits for anything, though this process dies.
                self._devices.set_below_local(lv_bytes)
                self._report.event("verifying", volume=self._arrival.volume)
                while not self._verify(lv_bytes, remote):
                    time.sleep(_AGAIN_SECONDS)
        except (RestoreDiffersError, TargetError, VolumeError) as err:
            # All is read from the repository again, and brought anew when the restore is gone on with.
            self._reach("arriving")
            self._move(lv_bytes, remote, 0)
            self._report.warn(
                f"what has arrived is read from the repository again: {err.brief}",
                resolution="look for I/O errors in the kernel log (dmesg); end this command, then bring all "
                f"anew: blocksnap restore --instant --resume {self._arrival.volume}",
            )
        except BlocksnapError as err:
            lost = LostRangeError(self._backup, err) if isinstance(err, UnreadableRangeError) else err
            self._report.warn(f"no more data arrives: {lost.brief}", resolution=lost.resolution)
        else:
            return
        self._report.event("serving-only", volume=self._arrival.volume)
        while True:
            time.sleep(_WRITES_SECONDS)

    def _verify(self, lv_bytes: int, remote: int) -> bool:
        """Read back what has arrived, to which nothing else is written yet.

        False when the repository, which has the map, cannot be reached. Raises RestoreDiffersError.
        """
        target = self._target(lv_bytes, remote)
        try:
            verify_target(self._repository, self._backup, target, self._report, Ranges())
        except StorageError as err:
            self._tell(err)
            return False
        finally:
            target.close()
        return True

    def _fill(self, lv_bytes: int, remote: int) -> float:
        """Bring the data; return 0, or after how many seconds to try again.

        It waits for a repository that cannot be reached, and for a volume that cannot be written to: those
        who use it are served meanwhile.
        """
        try:
            self._devices.require_capacity(lv_bytes)
            self._bring(lv_bytes, remote)
        except StorageError as err:
            self._tell(err)
            return _AGAIN_SECONDS
        except TargetError as err:
            shrunk = self._follow_size(lv_bytes)
            if shrunk is not None:
                # Before it is told: whoever reads that may make it larger again.
                self._move(lv_bytes, remote, self._reached())
            self._tell_of_target(shrunk or err)
            return _TARGET_AGAIN_SECONDS
        return 0.0

    def _bring(self, lv_bytes: int, remote: int) -> None:
        target = self._target(lv_bytes, remote)
        read_map = partial(read_runs, MapReader(self._repository.load_node), self._backup, None)
        try:
            with phase(self._report, f"restoring {self._backup.volume.name}", self._backup.size):
                restore_to_target(self._repository, self._geometry, read_map, target, self._report.advance)
            target.finish()
        except BaseException as err:
            if not isinstance(err, TargetError):
                # Who reads from a repository that is away would be waited for, and all others with him.
                target.stay()
            # Should that fail as well it must not hide what led to it, a signal least of all.
            with suppress(TargetError):
                target.close(keep=may_go_on(err))
            raise
        target.close()

    def _follow_size(self, lv_bytes: int) -> VolumeShrunkError | None:
        """Have brought again what a volume that was made smaller has lost; return what to tell if it was."""
        try:
            self._devices.require_capacity(lv_bytes)
        except VolumeShrunkError as shrunk:
            ArrivingTarget.take_back_to(self._devices.node, self._record, shrunk.size)
            return shrunk
        return None

    def _target(self, lv_bytes: int, remote: int) -> ArrivingTarget:
        moved = partial(self._move, lv_bytes, remote)
        hold_back = partial(self._hold_back, lv_bytes)
        node, size = self._devices.node, self._backup.size
        return ArrivingTarget(node, size, self._record, self._limits, moved, hold_back, self._first)

    def _move(self, lv_bytes: int, remote: int, reached: int) -> None:
        """Have what has arrived read from the volume from now on."""
        self._devices.set_below(
            below_table(
                lv_bytes=lv_bytes,
                size=self._backup.size,
                head=head_bytes(self._geometry),
                reached=reached,
                local=self._devices.local(),
                remote=remote,
                capacity=self._devices.capacity(),
            )
        )

    def _reached(self) -> int:
        """Return up to where the data is there, but for the beginning."""
        if self._arrival.stage == "verifying":
            return self._backup.size
        return ArrivingTarget.reached_of(self._devices.node, self._record)

    @contextmanager
    def _writes_watched(self) -> Iterator[None]:
        """Tell when no writes are taken any more, whatever else is done or waited for."""
        is_over = threading.Event()

        def watch() -> None:
            while not is_over.wait(_WRITES_SECONDS):
                try:
                    self._devices.check_writes()
                except BlocksnapError as err:
                    self._tell(err)

        thread = threading.Thread(target=watch, name="blocksnap-writes", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def _hold_back(self, lv_bytes: int, length: int) -> float:
        """Return how many seconds to wait before so much is written; look now and then whether it can be."""
        now = time.monotonic()
        with self._lock:
            is_due = now - self._looked >= _WRITES_SECONDS
            if is_due:
                self._looked = now
            delay = self._bucket.take(length, now) if self._bucket is not None else 0.0
        if is_due:
            self._devices.require_capacity(lv_bytes)
        return delay

    def _reach(self, stage: str) -> None:
        self._arrival = Arrival.model_validate({**self._arrival.model_dump(), "stage": stage})
        self._file.write(self._arrival)

    def _tell_of_target(self, err: TargetError) -> None:
        """Tell that the data cannot be written, and what to do, once of each way to fail."""
        remedy = "see dmesg for why (a failing disk, a full pool), and mend that"
        if isinstance(err, (PoolFillingError, VolumeShrunkError)):
            remedy = err.remedy
        # How full a pool is changes all the time.
        failure = remedy if isinstance(err, PoolFillingError) else err.brief
        with self._lock:
            if failure in self._told:
                return
            self._told.add(failure)
        self._report.warn(
            f"{err.brief}; what has not arrived is read from the repository until it can be written",
            resolution=f"{remedy}; the restore goes on by itself then",
        )

    def _tell(self, err: BlocksnapError) -> None:
        with self._lock:
            if err.brief in self._told:
                return
            self._told.add(err.brief)
        waits = "; what needs it waits" if isinstance(err, StorageError) else ""
        self._report.warn(f"{err.brief}{waits}", resolution=err.resolution)
