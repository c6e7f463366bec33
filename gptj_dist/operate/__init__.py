"""For the person who runs a server: launcher, doctor, calibration, verification. `serving` never imports it."""
