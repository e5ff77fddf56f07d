"""Files that exist already, made lazy: one `If` around the denoiser of an OpenVINO IR or an ONNX model."""
