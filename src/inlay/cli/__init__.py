"""The command: each verb parses its flags, calls the library function of the same name, and prints what came of it."""
