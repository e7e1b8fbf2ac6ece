"""Where the model and its calibration data come from."""
