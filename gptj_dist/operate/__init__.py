"""For the person who runs a server.

Knows how to launch, stop, diagnose, calibrate and verify. `serving` never imports it.
"""

__all__ = ["calibration", "drift", "tables", "text_settings", "verification"]
