/* Runs a model in a build of ONNX Runtime that is loaded from a file.
 *
 *   runner [-p PROVIDER] [-c KEY=VALUE]... [-o OUTPUT]... LIBRARY MODEL
 *
 * It runs in a folder with the files that processes.py tells of. PROVIDER stands before the CPU provider, each with one
 * thread; -c adds a session configuration entry; without -o all outputs are given. The profile is that of the first
 * run. The version of ONNX Runtime goes to standard output.
 *
 * Ends with 0: all is well. 3: ONNX Runtime refused something. 2: something else went wrong, and standard error tells
 * what.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "onnxruntime_c_api.h"

enum { BROKEN = 2, REFUSED = 3, MOST_NAMES = 4096, MOST_DIMENSIONS = 64 };

static const OrtApi *api;
static OrtAllocator *allocator;
static FILE *results;

/* --- ends -------------------------------------------------------------------------------------------------------- */

/* Without unwinding: the library's own clearing up is nobody's concern. */
static _Noreturn void end(int code) {
  fflush(NULL);
  _exit(code);
}

static _Noreturn void broken(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fputc('\n', stderr);
  end(BROKEN);
}

static FILE *create(const char *path) {
  FILE *file = fopen(path, "wb");
  if (!file) broken("%s: cannot be written", path);
  return file;
}

static _Noreturn void refused(const char *format, ...) {
  FILE *refusal = create("refusal");
  va_list arguments;
  va_start(arguments, format);
  vfprintf(refusal, format, arguments);
  va_end(arguments);
  end(REFUSED);
}

static void check(OrtStatus *status) {
  if (status) refused("%s", api->GetErrorMessage(status));
}

/* --- files of tensors -------------------------------------------------------------------------------------------- */

typedef struct {
  const char *data;
  size_t size, place;
} Reader;

static void *take(Reader *reader, size_t size) {
  if (size > reader->size - reader->place) broken("the feeds are broken at byte %zu", reader->place);
  const char *found = reader->data + reader->place;
  reader->place += size;
  return (void *)found;
}

static uint32_t take_u32(Reader *reader) {
  uint32_t value;
  memcpy(&value, take(reader, sizeof value), sizeof value);
  return value;
}

static Reader read_whole(const char *path) {
  FILE *file = fopen(path, "rb");
  if (!file || fseek(file, 0, SEEK_END)) broken("%s: cannot be read", path);
  long size = ftell(file);
  rewind(file);
  char *data = malloc(size > 0 ? (size_t)size : 1);
  if (size < 0 || !data || fread(data, 1, (size_t)size, file) != (size_t)size) broken("%s: cannot be read", path);
  fclose(file);
  return (Reader){data, (size_t)size, 0};
}

static char *take_name(Reader *reader) {
  uint32_t length = take_u32(reader);
  char *name = strndup(take(reader, length), length);
  if (!name) broken("out of memory");
  return name;
}

static OrtValue *take_tensor(Reader *reader, OrtMemoryInfo *memory) {
  uint32_t type = take_u32(reader), rank = take_u32(reader);
  if (rank > MOST_DIMENSIONS) broken("the feeds are broken at byte %zu", reader->place);
  int64_t shape[MOST_DIMENSIONS];
  memcpy(shape, take(reader, rank * sizeof *shape), rank * sizeof *shape);
  uint64_t size;
  memcpy(&size, take(reader, sizeof size), sizeof size);
  void *inside = take(reader, size), *aligned; /* kernels read whole vectors from where a tensor begins */
  if (posix_memalign(&aligned, 64, size ? size : 1)) broken("out of memory");
  memcpy(aligned, inside, size);
  OrtValue *value = NULL;
  check(api->CreateTensorWithDataAsOrtValue(memory, aligned, size, shape, rank, (ONNXTensorElementDataType)type,
                                            &value));
  return value;
}

static void put(const void *data, size_t size) {
  if (fwrite(data, 1, size, results) != size) broken("the results cannot be written");
}

static void put_u32(size_t value) {
  uint32_t narrow = (uint32_t)value;
  put(&narrow, sizeof narrow);
}

static void put_tensor(const char *name, const OrtValue *value) {
  int is_tensor = 0;
  if (value) check(api->IsTensor(value, &is_tensor));
  if (!is_tensor) refused("the output %s is no tensor", name);
  OrtTensorTypeAndShapeInfo *info;
  check(api->GetTensorTypeAndShape(value, &info));
  ONNXTensorElementDataType type;
  check(api->GetTensorElementType(info, &type));
  if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_STRING || type > ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64)
    refused("the output %s has the element type %d, which cannot be handed over", name, (int)type);
  size_t rank, size;
  check(api->GetDimensionsCount(info, &rank));
  if (rank > MOST_DIMENSIONS) refused("the output %s has %zu dimensions", name, rank);
  int64_t shape[MOST_DIMENSIONS];
  check(api->GetDimensions(info, shape, rank));
  check(api->GetTensorSizeInBytes(value, &size));
  const void *data;
  check(api->GetTensorData(value, &data));
  uint64_t bytes = size;
  put_u32(strlen(name));
  put(name, strlen(name));
  put_u32(type);
  put_u32(rank);
  put(shape, rank * sizeof *shape);
  put(&bytes, sizeof bytes);
  put(data, size);
  api->ReleaseTensorTypeAndShapeInfo(info);
}

/* --- the command line -------------------------------------------------------------------------------------------- */

typedef struct {
  const char *provider, *library, *model;
  char *keys[MOST_NAMES], *values[MOST_NAMES], *outputs[MOST_NAMES];
  size_t entries, output_count;
} Order;

static void add_entry(Order *order, char *entry) {
  char *equals = strchr(entry, '=');
  if (!equals || order->entries == MOST_NAMES) broken("-c %s: expected KEY=VALUE, at most %d times", entry, MOST_NAMES);
  *equals = '\0';
  order->keys[order->entries] = entry;
  order->values[order->entries++] = equals + 1;
}

static void add_output(Order *order, char *name) {
  if (order->output_count == MOST_NAMES) broken("more than %d outputs", MOST_NAMES);
  order->outputs[order->output_count++] = name;
}

static void read_order(Order *order, int count, char **words) {
  int letter;
  while ((letter = getopt(count, words, "p:c:o:")) != -1) {
    if (letter == 'p') order->provider = optarg;
    else if (letter == 'c') add_entry(order, optarg);
    else if (letter == 'o') add_output(order, optarg);
    else end(BROKEN);
  }
  if (count - optind != 2) broken("expected LIBRARY MODEL, got %d words", count - optind);
  order->library = words[optind], order->model = words[optind + 1];
}

/* --- ONNX Runtime ------------------------------------------------------------------------------------------------ */

static void load_library(const char *path) {
  void *library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
  if (!library) broken("%s", dlerror());
  const OrtApiBase *(*base)(void) = NULL;
  *(void **)&base = dlsym(library, "OrtGetApiBase");
  if (!base) broken("%s: is no ONNX Runtime", path);
  api = base()->GetApi(ORT_API_VERSION);
  if (!api) broken("%s: does not have version %d of the interface", path, ORT_API_VERSION);
  puts(base()->GetVersionString());
}

static OrtSession *open_session(const Order *order) {
  OrtEnv *environment;
  OrtSessionOptions *options;
  OrtSession *session;
  check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "onnxcomp", &environment));
  check(api->CreateSessionOptions(&options));
  check(api->SetIntraOpNumThreads(options, 1));
  check(api->EnableProfiling(options, "profile"));
  for (size_t index = 0; index < order->entries; index++)
    check(api->AddSessionConfigEntry(options, order->keys[index], order->values[index]));
  if (order->provider) {
    const char *const key = "intra_op_num_threads", *const value = "1";
    check(api->SessionOptionsAppendExecutionProvider(options, order->provider, &key, &value, 1));
  }
  check(api->CreateSession(environment, order->model, options, &session));
  return session;
}

static void name_all_outputs(Order *order, const OrtSession *session) {
  size_t count;
  check(api->SessionGetOutputCount(session, &count));
  for (size_t index = 0; index < count; index++) {
    char *name;
    check(api->SessionGetOutputName(session, index, allocator, &name));
    add_output(order, name);
  }
}

static void run_once(const Order *order, OrtSession *session, OrtMemoryInfo *memory, Reader *feeds) {
  static const char *names[MOST_NAMES];
  static OrtValue *inputs[MOST_NAMES], *outputs[MOST_NAMES];
  uint32_t count = take_u32(feeds);
  if (count > MOST_NAMES) broken("more than %d inputs", MOST_NAMES);
  for (uint32_t index = 0; index < count; index++) {
    names[index] = take_name(feeds);
    inputs[index] = take_tensor(feeds, memory);
  }
  memset(outputs, 0, sizeof outputs);
  check(api->Run(session, NULL, names, (const OrtValue *const *)inputs, count,
                 (const char *const *)order->outputs, order->output_count, outputs));
  put_u32(order->output_count);
  for (size_t index = 0; index < order->output_count; index++) {
    put_tensor(order->outputs[index], outputs[index]);
    api->ReleaseValue(outputs[index]);
  }
  for (uint32_t index = 0; index < count; index++) {
    void *data;
    check(api->GetTensorMutableData(inputs[index], &data));
    api->ReleaseValue(inputs[index]);
    free(data);
    free((void *)names[index]);
  }
}

static void end_profile(OrtSession *session) {
  char *path;
  check(api->SessionEndProfiling(session, allocator, &path));
}

int main(int count, char **words) {
  static Order order;
  read_order(&order, count, words);
  load_library(order.library);
  check(api->GetAllocatorWithDefaultOptions(&allocator));
  OrtSession *session = open_session(&order);
  if (!order.output_count) name_all_outputs(&order, session);
  OrtMemoryInfo *memory;
  check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  Reader feeds = read_whole("feeds");
  results = create("results");
  uint32_t runs = take_u32(&feeds);
  put_u32(runs);
  for (uint32_t run = 0; run < runs; run++) {
    run_once(&order, session, memory, &feeds);
    if (run == 0) end_profile(session); /* the others execute the same nodes, and profiles grow large */
  }
  if (!runs) end_profile(session);
  if (fclose(results)) broken("the results cannot be written");
  end(0);
}
