// Marks a hot loop to be compiled twice, for AVX2 and for any x86-64; the loader picks once.
// The wheel must run on any x86-64, and baseline code converts voxels at a third of the speed.
// Wide clones have a third for AVX-512, for loops that compute more than they load.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(TAPCT_NO_CLONES)
#define TAPCT_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#define TAPCT_WIDE_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else  // sanitizers start after the loader has asked which clone to take
#define TAPCT_CLONES
#define TAPCT_WIDE_CLONES
#endif
