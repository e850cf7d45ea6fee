"""The storage side of Sheepfold: VDIs as logs of replicated immutable segments. Never imports nbdserver."""
