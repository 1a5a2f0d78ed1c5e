"""The Zoho SDK's side: its six methods, and conversion between its objects and ours."""
