"""Audit a converted model: run one forward and find the nonlinear operations outside its neurons."""
from .audit import Audit, audit
from .table import is_known, known_records
from .verdicts import Finding, message

__all__ = ['Audit', 'Finding', 'audit', 'is_known', 'known_records', 'message']
