"""Commands for people who are not at a shell: a page, a server."""
