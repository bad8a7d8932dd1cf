"""Other frameworks, one file each; a file needs its framework, and nothing else imports it."""
