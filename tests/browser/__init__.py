"""The page at `/` in a headless Chromium. Skipped where there is no Chromium or no playwright."""
