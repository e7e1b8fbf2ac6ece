"""The model as a row of blocks: views, objectives, moments, processes."""
