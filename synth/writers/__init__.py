"""One module for each writer; the protocol is in `sft_probe.synth.requests`."""
