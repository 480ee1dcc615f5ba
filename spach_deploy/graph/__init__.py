"""The ONNX graph: export, passes, what a caller sends and gets, and the certificate."""
