"""Training of an ONNX graph against the model that it was made from."""
