"""The command `pdl-ext`: one file a sub-command."""
