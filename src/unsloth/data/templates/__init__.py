"""Chat templates in Jinja, one file a format, written from what each format's maker documents."""
