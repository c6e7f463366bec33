"""How fast a model will be on given devices, and how to cut it for them. Arithmetic only: touches no device."""
