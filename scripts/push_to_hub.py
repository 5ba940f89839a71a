"""Publish a saved pipeline: `python scripts/push_to_hub.py FOLDER REPO_ID`, after `hf auth login`."""

from ncsn_diffusers.commands.push import main

if __name__ == "__main__":
    main()
