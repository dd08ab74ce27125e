// Kernels compiled together: they share CUTLASS's headers and most of its template instantiations.
#include "w4a16_sm90_cutlass_fgsz_cta128x64x64_cluster2x1x1_cooperative_streamk.cu"
#include "w4a16_sm90_cutlass_cs_cta64x16x64_cluster1x1x1_pingpong_persistent.cu"
