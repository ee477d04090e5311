"""The report: complete, offline, and safe against the run directory that it shows."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bessemer.cli.report import report as report_command
from bessemer.errors import RunError
from bessemer.tracking.report import write_report

from .conftest import png  # type: ignore[import-not-found]
