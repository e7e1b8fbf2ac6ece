"""What is on disk or far away: files that are whole or not there, the cache, the Hub."""
