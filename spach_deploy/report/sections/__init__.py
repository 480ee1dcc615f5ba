"""The sections of a page, a file each: `view(content)` gives what its template shows, None where there is nothing."""
