"""What a user runs: `ncsn-diffusers train`, or `accelerate launch -m ncsn_diffusers.commands.train`."""
