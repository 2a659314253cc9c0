"""What is compared with which version of the original.

- VAR: reference numbers of its code at commit 78b9539; keys and shapes of its published files.
- LlamaGen, taming-transformers: reference numbers of their code (tests/golden/README.md); taming's
  GumbelQuantize: its formula, written out.
- diffusers 0.42.1, transformers 5.24.0: the installed packages, with random weights; official sizes
  on the meta device.
- MaskGIT-VQGAN: reference numbers of open-muse's code at commit 64e1afe.
- ONNX: onnxruntime 1.32.0 and torch 2.13.0, on the same weights.
"""
