"""Google's object storage, by gcsfs; its login is the machine's (GOOGLE_APPLICATION_CREDENTIALS, workload identity)."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from trainway.errors import EnvironmentFault


def open_gcs() -> Any:
    """gcsfs's file system. Raises EnvironmentFault when gcsfs is not installed."""
    if importlib.util.find_spec("gcsfs") is None:
        raise EnvironmentFault("gs:// needs gcsfs, which is not installed", "", "pip install 'trainway[gcs]'")
    return importlib.import_module("gcsfs").GCSFileSystem(use_listings_cache=False, consistency="md5")
