"""Hot, incremental, block-level backups of LVM volumes and btrfs subvolumes."""

__version__ = "0.1.0"
