"""Assets with captions, their rendered rings of views, and the data sets that training reads."""
