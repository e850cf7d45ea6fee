"""The network side of Sheepfold: NBD handshake, transmission, exports, control API and command line."""
