// SPDX-License-Identifier: Apache-2.0
// The door to libxml2: as much of writing and of reading as a mapping needs. What is read is
// not trusted: no entities, no network, no more depth than the mapping has.

import CLibXML2
import DiskFormats
import Glibc
import SystemIO

/// libxml2's functions, loaded at the first use; or why they are not there.
private let loaded: Result<libxml2, ImageError> = {
  let library = UnsafeMutablePointer<libxml2>.allocate(capacity: 1)
  defer { library.deallocate() }
  if let reason = libxml2_load(library) {
    let words = "libxml2 is needed for this and is not there: \(String(cString: reason))"
    return .failure(ImageError(.unsupported, words))
  }
  return .success(library.pointee)
}()

/// Writes XML, indented. Used from one thread.
final class XMLWriter {
  private let xml: libxml2
  private let writer: xmlTextWriterPtr
  private let name: String

  /// Writes to a file, standard output without a path.
  init(_ path: String?) throws(ImageError) {
    name = path ?? "the standard output"
    xml = try loaded.get()
    guard let writer = xml.xmlNewTextWriterFilename(path ?? "-", 0) else {
      throw ImageError(IOError.last("make", name))
    }
    self.writer = writer
    try check(xml.xmlTextWriterSetIndent(writer, 1))
    try check(xml.xmlTextWriterSetIndentString(writer, "  "))
  }

  deinit { xml.xmlFreeTextWriter(writer) }

  private func check(_ result: Int32) throws(ImageError) {
    guard result >= 0 else { throw ImageError(IOError.last("write", name)) }
  }

  func comment(_ text: String) throws(ImageError) {
    try check(xml.xmlTextWriterWriteComment(writer, text))
  }

  func start(_ element: String, _ attributes: [(String, String)]) throws(ImageError) {
    try check(xml.xmlTextWriterStartElement(writer, element))
    for (name, value) in attributes {
      try check(xml.xmlTextWriterWriteAttribute(writer, name, value))
    }
  }

  func end() throws(ImageError) { try check(xml.xmlTextWriterEndElement(writer)) }

  /// Ends every element and writes what is left.
  func finish() throws(ImageError) {
    try check(xml.xmlTextWriterEndDocument(writer))
    try check(xml.xmlTextWriterFlush(writer))
  }
}

/// Reads XML as one element or comment after the other. Used from one thread.
final class XMLReader {
  /// What was read.
  enum Node {
    case element(String)
    case comment(String)
  }

  private let xml: libxml2
  private let reader: xmlTextReaderPtr
  private let path: String

  init(_ path: String) throws(ImageError) {
    self.path = path
    xml = try loaded.get()
    guard access(path, R_OK) == 0 else { throw ImageError(IOError.last("open", path)) }
    let options = Int32(
      XML_PARSE_NONET.rawValue | XML_PARSE_NOERROR.rawValue | XML_PARSE_NOWARNING.rawValue
        | XML_PARSE_NOCDATA.rawValue)
    guard let reader = xml.xmlReaderForFile(path, nil, options) else {
      throw ImageError(IOError.last("open", path))
    }
    self.reader = reader
  }

  deinit { xml.xmlFreeTextReader(reader) }

  /// The line that is being read.
  var line: Int { Int(xml.xmlTextReaderGetParserLineNumber(reader)) }

  func refuse(_ words: String) -> ImageError {
    ImageError(.badRequest, "\(path), line \(line): \(words)")
  }

  /// The next element or comment; nil at the end. Throws `badRequest` for what is no XML.
  func next() throws(ImageError) -> Node? {
    while true {
      switch xml.xmlTextReaderRead(reader) {
      case 0: return nil
      case 1: break
      default: throw refuse("this is not well-formed XML")
      }
      switch UInt32(xml.xmlTextReaderNodeType(reader)) {
      case XML_READER_TYPE_ELEMENT.rawValue:
        guard xml.xmlTextReaderDepth(reader) < 4 else { throw refuse("elements too deep") }
        return .element(text(xml.xmlTextReaderConstName(reader)))
      case XML_READER_TYPE_COMMENT.rawValue:
        return .comment(text(xml.xmlTextReaderConstValue(reader)))
      case XML_READER_TYPE_DOCUMENT_TYPE.rawValue, XML_READER_TYPE_ENTITY_REFERENCE.rawValue:
        throw refuse("a mapping has no document type and no entities")
      default: continue
      }
    }
  }

  private func text(_ pointer: UnsafePointer<xmlChar>?) -> String {
    pointer.map { String(cString: $0) } ?? ""
  }

  /// The value of an attribute of the current element; nil when it has none by that name.
  func attribute(_ name: String) -> String? {
    guard let value = xml.xmlTextReaderGetAttribute(reader, name) else { return nil }
    defer { xmlFreeFunction(value) }
    return String(cString: value)
  }

  private func xmlFreeFunction(_ pointer: UnsafeMutablePointer<xmlChar>) {
    // libxml2's own name for it is a variable, which Swift 6 calls unsafe; it is free(3).
    free(pointer)
  }

  /// The number in an attribute. Throws `badRequest` when it is missing or no number.
  func number(_ name: String) throws(ImageError) -> UInt64 {
    guard let text = attribute(name) else { throw refuse("\(name) is missing") }
    guard let number = UInt64(text) else { throw refuse("\(name)='\(text)' is no number") }
    return number
  }
}
