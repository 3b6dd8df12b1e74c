"""To and from the Hub: copies, uploads, downloads, and the cards that visitors read."""
