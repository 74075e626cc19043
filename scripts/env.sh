# What the other scripts source first.

# Where stdin is closed, the first file that a program opens would take its place.
{ : <&0; } 2>/dev/null || exec </dev/null

# XLA on the CPU maps its temporaries anew at every step; huge pages make that cheap (glibc >= 2.35).
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
