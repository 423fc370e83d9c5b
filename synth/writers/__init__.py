"""Writers of texts, one module each; `sft_probe.synth.requests.Writer` is their protocol."""
