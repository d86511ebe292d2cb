"""Methods that only templates and verbalizers give a meaning to, each in the file of its kind."""
