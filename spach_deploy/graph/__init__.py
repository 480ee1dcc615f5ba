"""The ONNX graph: export from PyTorch, passes, input and output nodes, precision, opset, certificate."""
