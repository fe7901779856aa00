"""Every document the repository stores, as a model: config, key, writer record, manifest.

Documents are JSON, validated here on the way in and out, and stored as one frame each. Unknown
fields are refused: a newer version that needs one says so through ``Config.features``.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
)

from blocksnap.repository.keys import Role

FORMAT_VERSION = 1
FEATURES: frozenset[str] = frozenset()
"""Features that this version knows."""
Operation = Literal["read", "write", "gc", "check"]
"""What a repository may need features for."""

Hex16 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Hex32 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Hex64 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]
Line = Annotated[str, StringConstraints(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""Text that somebody typed, on one line."""
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Moment = Annotated[
    AwareDatetime, Field(ge=datetime(1970, 1, 1, tzinfo=UTC), lt=datetime(9000, 1, 1, tzinfo=UTC))
]
"""When something was, with its offset: within what any time zone can show, and what can be reckoned with."""
ChunkSize = Annotated[int, Field(ge=16 << 10, le=4 << 20)]

MIN_CHUNK_SIZE, MAX_CHUNK_SIZE, DEFAULT_CHUNK_SIZE = 16 << 10, 4 << 20, 128 << 10


class Document(BaseModel):
    """Common to all: immutable, and nothing unknown in it."""

    # A process builds only the models it uses: opening a repository needs three of them.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Features(Document):
    """Names a program has to know before it may do each of these; whatever it does, it has to read."""

    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    gc: tuple[str, ...] = ()
    check: tuple[str, ...] = ()


class Config(Document):
    """The object ``config``: what has to be known before anything else can be read."""

    format: int
    id: Hex16
    created: Moment
    chunk_size: ChunkSize
    encryption: Literal["aes-256-gcm", "none"]
    features: Features = Features()


class Kdf(Document):
    """How a passphrase becomes a key: argon2id, its cost and salt."""

    name: Literal["argon2id"] = "argon2id"
    memory_kib: int
    passes: int
    lanes: int
    salt: Hex32


class KeyAbout(Document):
    """What anybody may know of a key.

    ``host`` is the name of the host it was made for, and ``config`` the BLAKE3 of the config object of the
    repository that it opens.
    """

    id: Hex16
    created: Moment
    label: Line = ""
    role: Role
    host: Line = ""
    config: Hex32


class Key(Document):
    """An object ``keys/<id>``: key material, wrapped by a passphrase."""

    format: int = FORMAT_VERSION
    about: KeyAbout
    kdf: Kdf
    wrapped: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32,4096}$")]


class KeyMaterial(Document):
    """What is wrapped in a key.

    ``keys`` are those of the role, by name. ``about`` is what the object says in the clear, which is thereby
    authenticated, and with it the config object.
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    about: KeyAbout
    keys: dict[str, Hex32] = Field(repr=False)


class WriterRecord(Document):
    """An object ``writers/<wid>.<n>``: a run announces itself, and says later what it has stored.

    ``packs`` are those published since the record before this one; a run that has committed names its
    manifest there in its last one. ``epoch`` is the last condemned one that the run has heeded. ``boot`` and
    ``started`` tell the process from others that have had its pid.
    Nobody waits for a run that ``collects``.
    """

    format: int = FORMAT_VERSION
    writer: Hex16
    sequence: Count
    host: str
    hostname: str
    pid: Count
    boot: str = ""
    started: Count = 0
    time: Moment
    packs: tuple[str, ...] = ()
    epoch: Count | None = None
    collects: bool = False

    @property
    def tells_of_commit(self) -> bool:
        """Whether it was made when the run's manifest was there."""
        return f"manifests/{self.writer}" in self.packs


class Root(Document):
    """The root of a block map: ``levels`` of nodes, and an id, ``hole`` or ``zero``."""

    levels: Annotated[int, Field(ge=1, le=10)]
    root: Annotated[str, StringConstraints(pattern=r"^(hole|zero|[0-9a-f]{64})$")]


class Mapped(Document):
    """The set of units of the volume that were mapped: a bitmap, stored as a map of its 4 KiB pages."""

    unit: Annotated[int, Field(ge=512)]
    length: Count
    map: Root


class Inodes(Document):
    """What a backup of a subvolume says of its map, whose leaves are pages of inode records.

    ``pages`` is how many the map has room for, ``count`` how many inodes there are.
    """

    pages: Annotated[int, Field(ge=1, le=1 << 60)]
    count: Count


class VolumeRecord(Document):
    """Which volume a backup is of."""

    name: str
    key: str
    kind: str


class Statistics(Document):
    """What a backup read, stored and took; all sizes in bytes."""

    changed_bytes: Count
    read_bytes: Count
    new_bytes: Count
    stored_bytes: Count
    metadata_bytes: Count
    new_chunks: Count
    freeze_ms: Annotated[float, Field(ge=0)]
    skew_ms: Annotated[float, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0)]


class ApplicationRecord(Document):
    """What an application said of itself when its snapshots were taken, of which a restore may need some."""

    kind: str
    name: str
    facts: dict[str, str]


class Quiesced(Document):
    """What stood still while the snapshots of a run were taken, for how long, and how that ended.

    ``application``: hooks or databases held it until the last snapshot; ``frozen``: processes or filesystems
    stood still; ``failed``: something was to, and ``reason`` says why it did not.
    """

    state: Literal["application", "frozen", "failed"]
    by: tuple[str, ...] = ()
    reason: str | None = None
    ms: Annotated[float, Field(ge=0)] = 0.0
    records: tuple[ApplicationRecord, ...] = ()


class Backup(Document):
    """One volume at one time.

    With ``inodes`` it is a subvolume: ``map`` leads to inode records, and ``size`` is that of all files.
    """

    id: Hex16
    volume: VolumeRecord
    time: Moment
    kind: Literal["full", "incremental"]
    parent: Hex16 | None
    method: str
    reason: str
    size: Count
    chunk_size: ChunkSize
    map: Root
    mapped: Mapped | None = None
    inodes: Inodes | None = None
    source: dict[str, JsonValue]
    consistency: Literal["crash", "application", "cold"] = "crash"
    quiesced: Quiesced | None = None
    statistics: Statistics

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, serialize: SerializerFunctionWrapHandler) -> dict[str, JsonValue]:
        document: dict[str, JsonValue] = serialize(self)
        # Left out, the document is what it was before there was such a field.
        for name in ("quiesced", "inodes"):
            if document.get(name, False) is None:
                del document[name]
        quiesced = document.get("quiesced")
        if isinstance(quiesced, dict) and not quiesced.get("records", True):
            del quiesced["records"]
        return document


class RecordedDisk(Document):
    """A disk that volumes lie on, with its partitions as ``sfdisk --dump`` writes them, if it has any."""

    path: str
    size: Count
    table: str = ""


class RecordedMount(Document):
    """Where the filesystem of a device was mounted."""

    source: str
    point: str
    filesystem: str


class RecordedHeader(Document):
    """A LUKS container, under which name it was open, and the volume that is its header."""

    volume: Line
    path: str
    mapping: str = ""


class Recovery(Document):
    """What there has to be on a bare machine before volumes can be restored to it.

    ``groups`` are volume groups by name, each as LVM's ``vgcfgbackup`` writes it.
    """

    groups: dict[str, str] = {}
    disks: tuple[RecordedDisk, ...] = ()
    headers: tuple[RecordedHeader, ...] = ()
    mounts: tuple[RecordedMount, ...] = ()
    fstab: str = ""

    @model_serializer(mode="wrap")
    def _without_no_headers(self, serialize: SerializerFunctionWrapHandler) -> dict[str, JsonValue]:
        document: dict[str, JsonValue] = serialize(self)
        if not document.get("headers", True):
            del document["headers"]
        return document


class Manifest(Document):
    """An object ``manifests/<wid>``: all backups of one run. Its creation is the commit."""

    format: int = FORMAT_VERSION
    writer: Hex16
    time: Moment
    host: str
    hostname: str
    program: str
    tags: dict[str, str] = {}
    recovery: Recovery | None = None
    backups: Annotated[tuple[Backup, ...], Field(min_length=1)]

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, serialize: SerializerFunctionWrapHandler) -> dict[str, JsonValue]:
        document: dict[str, JsonValue] = serialize(self)
        if document.get("recovery", False) is None:
            del document["recovery"]
        return document


class Signed(Document):
    """What the object of a signed document holds: the document as text, and who vouches for it."""

    format: int = FORMAT_VERSION
    document: str
    signature: Hex64


class Fence(Document):
    """What stands at ``manifests/<wid>`` when a silent writer was shut out: it can never commit."""

    format: int = FORMAT_VERSION
    writer: Hex16
    time: Moment
    fenced: Literal[True]


class Forgotten(Document):
    """An object ``gc/forget/<wid>``: backups that are given up, each by its id."""

    format: int = FORMAT_VERSION
    run: Hex16
    time: Moment
    backups: Annotated[tuple[Hex16, ...], Field(min_length=1)]


class Condemned(Document):
    """An object ``gc/<epoch>/condemned``: what is to go, and by which manifests that was decided.

    ``marked`` are the manifests whose needs were looked at, ``forgotten`` the backups that were passed over,
    ``aside`` the runs of repairs that were known.
    """

    format: int = FORMAT_VERSION
    epoch: Count
    run: Hex16
    time: Moment
    packs: tuple[str, ...]
    marked: tuple[Hex16, ...]
    forgotten: tuple[Hex16, ...]
    aside: tuple[Hex16, ...] = ()


class Sweep(Document):
    """An object ``gc/<epoch>/sweep``: what really goes. Nothing else is ever deleted in this epoch."""

    format: int = FORMAT_VERSION
    epoch: Count
    run: Hex16
    time: Moment
    packs: tuple[str, ...]
    manifests: tuple[Hex16, ...]


class LostRange(Document):
    """A range of a backup, in bytes, that a repair could not bring back; of a subvolume, in one ``inode``.

    A range of an inode that has no length is its record, or something that belongs to it.
    """

    backup: Hex16
    offset: Count
    length: Count
    inode: Count = 0

    @model_serializer(mode="wrap")
    def _without_no_inode(self, serialize: SerializerFunctionWrapHandler) -> dict[str, JsonValue]:
        document: dict[str, JsonValue] = serialize(self)
        if not self.inode:
            del document["inode"]
        return document


class SetAside(Document):
    """An object ``gc/aside/<run>``: what a repair has found damaged and replaced as far as that goes.

    ``packs`` are the last resort of readers, and no writer or collector relies on them. ``objects`` need not
    be read any more. ``lost`` are ids of chunks and map nodes that somebody has given up. ``ranges`` says
    of which backups what was lost at that time.
    """

    format: int = FORMAT_VERSION
    run: Hex16
    time: Moment
    packs: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    lost: tuple[Hex32, ...] = ()
    ranges: tuple[LostRange, ...] = ()


class Checked(Document):
    """An object ``checks/<run>``: the packs that a check has read, at level 3 or 4."""

    format: int = FORMAT_VERSION
    run: Hex16
    time: Moment
    hostname: str
    level: Literal[3, 4]
    good: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()


class DrillStep(Document):
    """One thing that was tried, how long it took, and the last of what it said."""

    step: str
    seconds: Annotated[float, Field(ge=0)]
    ok: bool
    said: str = ""


class Drilled(Document):
    """An object ``drills/<time>-<run>``: what came of a drill of a backup.

    ``chunks`` and ``sampled_bytes`` are those of the sample that was read again.
    """

    format: int = FORMAT_VERSION
    run: Hex16
    time: Moment
    hostname: str
    backup: Hex16
    volume: VolumeRecord
    good: bool
    seconds: Annotated[float, Field(ge=0)]
    chunks: Count
    sampled_bytes: Count
    steps: tuple[DrillStep, ...] = ()


class Done(Document):
    """An object ``gc/<epoch>/done``: all that the sweep names is gone."""

    format: int = FORMAT_VERSION
    epoch: Count
    run: Hex16
    time: Moment
