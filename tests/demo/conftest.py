# SPDX-License-Identifier: Apache-2.0
"""The demo's modules find each other as programs do: in the directory of the one that was started."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
