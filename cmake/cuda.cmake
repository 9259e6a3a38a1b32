# Finds an nvcc and builds the CUDA kernels. Sets R1KERNELS_CUDA_BUILT, _OBJECTS and _ARCHITECTURES.

# CUDACXX, or the toolkit's own nvcc before one on PATH, which may be a wrapper that hides the toolkit's root
unset(R1KERNELS_NVCC CACHE)
if(NOT "$ENV{CUDACXX}" STREQUAL "")
  find_program(R1KERNELS_NVCC $ENV{CUDACXX})
else()
  find_program(R1KERNELS_NVCC nvcc
    HINTS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin NO_DEFAULT_PATH)
  find_program(R1KERNELS_NVCC nvcc)
endif()
if(NOT R1KERNELS_NVCC)
  if(R1KERNELS_CUDA STREQUAL "ON")
    message(FATAL_ERROR "R1KERNELS_CUDA=ON, and no nvcc was found: put it on PATH, or set CUDACXX or CUDA_HOME")
  endif()
  message(STATUS "r1kernels: no nvcc was found, the CUDA kernels are not built")
  return()
endif()

execute_process(COMMAND ${R1KERNELS_NVCC} --list-gpu-code OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "sm_[0-9]+" known "${known}")
foreach(architecture 80 86 89 90 90a 100 120)
  string(REGEX REPLACE "a$" "" listed ${architecture})  # nvcc lists no variants
  if("sm_${listed}" IN_LIST known)
    list(APPEND R1KERNELS_CUDA_ARCHITECTURES ${architecture})
  endif()
endforeach()
# binaries for each, and PTX of the newest, which later devices translate
list(GET R1KERNELS_CUDA_ARCHITECTURES -1 newest)
list(TRANSFORM R1KERNELS_CUDA_ARCHITECTURES APPEND "-real" OUTPUT_VARIABLE portable)
list(APPEND portable "${newest}-virtual")

set(CMAKE_CUDA_COMPILER ${R1KERNELS_NVCC})
set(CMAKE_CUDA_ARCHITECTURES ${portable})  # before enable_language, or CMake asks for a device
set(CMAKE_CUDA_STANDARD 17)                # older CMake knows no CUDA20
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)     # the library then imports where there is no CUDA
set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)

file(GLOB portable_sources CONFIGURE_DEPENDS csrc/*/cuda_sm80*.cu)
file(GLOB hopper_sources CONFIGURE_DEPENDS csrc/*/cuda_sm90a*.cu)
if(portable_sources)
  add_library(r1kernels_cuda OBJECT ${portable_sources})
  target_include_directories(r1kernels_cuda PRIVATE csrc)
  list(APPEND R1KERNELS_CUDA_OBJECTS $<TARGET_OBJECTS:r1kernels_cuda>)
endif()
if(hopper_sources AND "90a" IN_LIST R1KERNELS_CUDA_ARCHITECTURES)
  add_library(r1kernels_cuda_sm90a OBJECT ${hopper_sources})
  target_include_directories(r1kernels_cuda_sm90a PRIVATE csrc ${R1KERNELS_CUTLASS_DIR})
  set_target_properties(r1kernels_cuda_sm90a PROPERTIES CUDA_ARCHITECTURES 90a-real)
  list(APPEND R1KERNELS_CUDA_OBJECTS $<TARGET_OBJECTS:r1kernels_cuda_sm90a>)
endif()
if(R1KERNELS_CUDA_OBJECTS)
  set(R1KERNELS_CUDA_BUILT ON)
else()
  set(R1KERNELS_CUDA_ARCHITECTURES "")
endif()
message(STATUS "r1kernels: CUDA ${CMAKE_CUDA_COMPILER_VERSION}, architectures ${R1KERNELS_CUDA_ARCHITECTURES}")
