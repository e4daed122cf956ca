from exported_model import exported, run  # noqa: F401
