/* SPDX-License-Identifier: Apache-2.0 */
// libxml2 when it is wanted. Loading it, with ICU behind it, is a quarter of the start of a
// program; of all that dmu-img does two commands want it, and of dmu-xen's one. So nothing is linked: the functions
// are found by name, with the types that libxml2's own headers give them.
#include <dlfcn.h>
#include <libxml/parser.h>
#include <libxml/xmlreader.h>
#include <libxml/xmlwriter.h>
#include <stddef.h>

#define LIBXML2_FUNCTIONS(each) \
  each(xmlFreeTextReader) \
  each(xmlFreeTextWriter) \
  each(xmlNewTextWriterFilename) \
  each(xmlReaderForFd) \
  each(xmlReaderForFile) \
  each(xmlTextReaderConstLocalName) \
  each(xmlTextReaderConstNamespaceUri) \
  each(xmlTextReaderConstValue) \
  each(xmlTextReaderDepth) \
  each(xmlTextReaderGetAttribute) \
  each(xmlTextReaderGetParserLineNumber) \
  each(xmlTextReaderNodeType) \
  each(xmlTextReaderRead) \
  each(xmlTextWriterEndDocument) \
  each(xmlTextWriterEndElement) \
  each(xmlTextWriterFlush) \
  each(xmlTextWriterSetIndent) \
  each(xmlTextWriterSetIndentString) \
  each(xmlTextWriterStartElement) \
  each(xmlTextWriterWriteAttribute) \
  each(xmlTextWriterWriteComment)

#define LIBXML2_FIELD(name) __typeof__(&name) _Nonnull name;

/// The functions of libxml2 that are needed.
struct libxml2 {
  LIBXML2_FUNCTIONS(LIBXML2_FIELD)
};

/// Finds them. Returns NULL, or what the loader says is missing, which stays until the next call.
static inline const char *_Nullable libxml2_load(struct libxml2 *_Nonnull library) {
  void *handle = dlopen("libxml2.so.2", RTLD_NOW | RTLD_LOCAL);
  if (!handle) return dlerror();
#define LIBXML2_FIND(name) \
  if (!(library->name = (__typeof__(&name))dlsym(handle, #name))) return dlerror();
  LIBXML2_FUNCTIONS(LIBXML2_FIND)
  return NULL;
}
