"""Other machines, builds and providers of ONNX Runtime that can be run on this one; each is a layer of `verify`."""
