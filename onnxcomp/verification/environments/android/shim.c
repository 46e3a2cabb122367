/* What Android's C library (bionic) has and glibc lacks, or has otherwise, on x86-64.
 *
 * These are exported by the runner, so that the library finds them when it is loaded. A function whose name begins
 * with a capital letter stands for the one of that name in bionic that takes or gives something else than glibc's:
 * elf.py spells the library's references to it so. What is not here is the same in both: the numbers of errno, the
 * flags of open and dlopen, struct stat, dirent and tm, mutexes, conditions, locks and thread attributes (opaque, and
 * as large), and the variables stdin, stdout and stderr.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/select.h>
#include <unistd.h>

/* --- what glibc lacks -------------------------------------------------------------------------------------------- */

int *__errno(void) { return &errno; }

enum { ANDROID_LOG_ERROR = 6 };

int __android_log_vprint(int priority, const char *tag, const char *format, va_list arguments) {
  if (priority < ANDROID_LOG_ERROR) return 0; /* there are warnings in plenty */
  fprintf(stderr, "%s: ", tag);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  return 1;
}

int __android_log_print(int priority, const char *tag, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int written = __android_log_vprint(priority, tag, format, arguments);
  va_end(arguments);
  return written;
}

int __android_log_write(int priority, const char *tag, const char *text) {
  return __android_log_print(priority, tag, "%s", text);
}

void android_set_abort_message(const char *message) { fprintf(stderr, "aborted: %s\n", message); }

/* The one property that the library asks for is the version of Android: this says Android 10. */
int __system_property_get(const char *name, char *value) {
  strcpy(value, strcmp(name, "ro.build.version.sdk") == 0 ? "29" : "");
  return (int)strlen(value);
}

/* Checks of buffers by the compiler: the sizes that it knows are not needed to do the work. */
size_t __strlen_chk(const char *text, size_t size) {
  (void)size;
  return strlen(text);
}

char *__strchr_chk(const char *text, int character, size_t size) {
  (void)size;
  return strchr(text, character);
}

void __FD_SET_chk(int descriptor, fd_set *set, size_t size) {
  (void)size;
  FD_SET(descriptor, set);
}

int __FD_ISSET_chk(int descriptor, const fd_set *set, size_t size) {
  (void)size;
  return FD_ISSET(descriptor, set);
}

char *__gnu_strerror_r(int number, char *buffer, size_t size) { return strerror_r(number, buffer, size); }

/* --- the standard streams ---------------------------------------------------------------------------------------- */

/* Code for old versions of Android has the address of stdin, stdout and stderr: elements of this array, whose size is
 * part of bionic's interface. Nothing reads or writes it; its addresses stand for glibc's streams. */
enum { BIONIC_FILE_BYTES = 152 };
char __sF[3][BIONIC_FILE_BYTES];

static FILE *stream(void *file) {
  if (file == __sF[0]) return stdin;
  if (file == __sF[1]) return stdout;
  if (file == __sF[2]) return stderr;
  return file;
}

int Vfprintf(void *file, const char *format, va_list arguments) { return vfprintf(stream(file), format, arguments); }

int Fprintf(void *file, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int written = vfprintf(stream(file), format, arguments);
  va_end(arguments);
  return written;
}

int Fputs(const char *text, void *file) { return fputs(text, stream(file)); }
int Fputc(int character, void *file) { return fputc(character, stream(file)); }
int Fflush(void *file) { return fflush(stream(file)); }
int Fileno(void *file) { return fileno(stream(file)); }

size_t Fwrite(const void *data, size_t size, size_t count, void *file) {
  return fwrite(data, size, count, stream(file));
}

/* --- what glibc has otherwise ------------------------------------------------------------------------------------ */

/* POSIX's, which gives a number; the symbol in glibc is GNU's, which gives a text. */
int __xpg_strerror_r(int number, char *buffer, size_t size);
int Strerror_r(int number, char *buffer, size_t size) { return __xpg_strerror_r(number, buffer, size); }

/* The same questions have other numbers. */
long Sysconf(int name) {
  switch (name) {
    case 0x06: return sysconf(_SC_CLK_TCK);
    case 0x27: /* _SC_PAGESIZE */
    case 0x28: return sysconf(_SC_PAGE_SIZE);
    case 0x47: return sysconf(_SC_GETGR_R_SIZE_MAX);
    case 0x48: return sysconf(_SC_GETPW_R_SIZE_MAX);
    case 0x60: return sysconf(_SC_NPROCESSORS_CONF);
    case 0x61: return sysconf(_SC_NPROCESSORS_ONLN);
    case 0x62: return sysconf(_SC_PHYS_PAGES);
    case 0x63: return sysconf(_SC_AVPHYS_PAGES);
    default:
      fprintf(stderr, "sysconf(%#x) of Android is not known here\n", name);
      errno = EINVAL;
      return -1;
  }
}

/* Only the length of a path is asked for, which is 5 in bionic. */
long Pathconf(const char *path, int name) { return name == 5 ? PATH_MAX : pathconf(path, name); }

/* A set of signals is 64 bits in bionic and 1,024 in glibc, which would write beyond it. */
int Sigfillset(uint64_t *set) {
  *set = UINT64_MAX;
  return 0;
}

int Pthread_sigmask(int how, const uint64_t *set, uint64_t *before) {
  sigset_t wide, wide_before;
  sigemptyset(&wide);
  if (set) memcpy(&wide, set, sizeof *set);
  int failed = pthread_sigmask(how, set ? &wide : NULL, &wide_before);
  if (before) memcpy(before, &wide_before, sizeof *before);
  return failed;
}

/* A reference without a version gets glibc's oldest realpath, which wants a buffer. */
char *Realpath(const char *path, char *buffer) {
  char *found = canonicalize_file_name(path);
  if (!found || !buffer) return found;
  strcpy(buffer, found); /* of PATH_MAX bytes, by the function's definition */
  free(found);
  return buffer;
}

/* long double is of 128 bits on Android, of 80 in glibc: nothing that ONNX Runtime computes is one. */
void Strtold_l(void) {
  fputs("strtold_l of Android has another long double than this machine\n", stderr);
  abort();
}

void Llroundl(void) {
  fputs("llroundl of Android has another long double than this machine\n", stderr);
  abort();
}
