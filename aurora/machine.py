"""Placeholder"""

from aurora.config import AuroraConfig
from aurora.environment import Finding


def examine(config: AuroraConfig) -> list[Finding]:
    """x"""
    return []
