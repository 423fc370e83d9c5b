"""Writers of texts, one module each; `sft_probe.synth.asking.protocol.Writer` is their protocol."""
