"""The commands of the command line, one module each. Importing them imports click, and nothing heavier."""

from __future__ import annotations
