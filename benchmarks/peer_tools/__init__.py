"""Other tools: `environments` installs them; the rest runs inside, where spach_deploy is not, one script a tool."""
