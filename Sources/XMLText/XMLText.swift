// SPDX-License-Identifier: Apache-2.0
// The door to libxml2: as much of writing and of reading as is needed here. What is read is not
// trusted: no entities, no network, no document type.

import CLibXML2
import Glibc
package import SystemIO

/// Why XML could not be read or written.
package enum XMLError: Error, Sendable, Equatable, CustomStringConvertible {
  /// libxml2 is not there; in words.
  case unavailable(String)
  case io(IOError)
  /// What was read is not what it should be; in words, with name and line.
  case malformed(String)

  /// A sentence.
  package var description: String {
    switch self {
    case .unavailable(let words), .malformed(let words): words
    case .io(let error): "\(error)"
    }
  }
}

/// libxml2's functions, loaded at the first use; or why they are not there.
private let loaded: Result<libxml2, XMLError> = {
  let library = UnsafeMutablePointer<libxml2>.allocate(capacity: 1)
  defer { library.deallocate() }
  if let reason = libxml2_load(library) {
    let words = "libxml2 is needed for this and is not there: \(String(cString: reason))"
    return .failure(.unavailable(words))
  }
  return .success(library.pointee)
}()

/// Writes XML, indented. Used from one thread.
package final class XMLWriter {
  private let xml: libxml2
  private let writer: xmlTextWriterPtr
  private let name: String

  /// Writes to a file, standard output without a path.
  package init(_ path: String?) throws(XMLError) {
    name = path ?? "the standard output"
    xml = try loaded.get()
    guard let writer = xml.xmlNewTextWriterFilename(path ?? "-", 0) else {
      throw XMLError.io(.last("make", name))
    }
    self.writer = writer
    try check(xml.xmlTextWriterSetIndent(writer, 1))
    try check(xml.xmlTextWriterSetIndentString(writer, "  "))
  }

  deinit { xml.xmlFreeTextWriter(writer) }

  private func check(_ result: Int32) throws(XMLError) {
    guard result >= 0 else { throw XMLError.io(.last("write", name)) }
  }

  /// Writes a comment.
  package func comment(_ text: String) throws(XMLError) {
    try check(xml.xmlTextWriterWriteComment(writer, text))
  }

  /// Begins an element.
  package func start(_ element: String, _ attributes: [(String, String)]) throws(XMLError) {
    try check(xml.xmlTextWriterStartElement(writer, element))
    for (name, value) in attributes {
      try check(xml.xmlTextWriterWriteAttribute(writer, name, value))
    }
  }

  /// Ends the element that was begun last.
  package func end() throws(XMLError) { try check(xml.xmlTextWriterEndElement(writer)) }

  /// Ends every element and writes what is left.
  package func finish() throws(XMLError) {
    try check(xml.xmlTextWriterEndDocument(writer))
    try check(xml.xmlTextWriterFlush(writer))
  }
}

/// Reads XML as one node after the other. Used from one thread.
package final class XMLReader {
  /// What was read.
  package enum Node: Sendable, Equatable {
    /// The beginning of an element: its name without a prefix, and what the prefix stands for.
    case element(String, namespace: String?)
    /// The end of an element that has one.
    case end(String)
    case text(String)
    case comment(String)
  }

  private let xml: libxml2
  private let reader: xmlTextReaderPtr
  private let name: String

  private static let options = Int32(
    XML_PARSE_NONET.rawValue | XML_PARSE_NOERROR.rawValue | XML_PARSE_NOWARNING.rawValue
      | XML_PARSE_NOCDATA.rawValue)

  /// Reads a file.
  package init(_ path: String) throws(XMLError) {
    name = path
    xml = try loaded.get()
    guard access(path, R_OK) == 0, let reader = xml.xmlReaderForFile(path, nil, Self.options)
    else { throw XMLError.io(.last("open", path)) }
    self.reader = reader
  }

  /// Reads from a descriptor, which is lent as long as this lives. `name`: for sentences.
  package init(descriptor: Int32, name: String) throws(XMLError) {
    self.name = name
    xml = try loaded.get()
    guard let reader = xml.xmlReaderForFd(descriptor, nil, nil, Self.options) else {
      throw XMLError.io(.last("read", name))
    }
    self.reader = reader
  }

  deinit { xml.xmlFreeTextReader(reader) }

  /// How many elements the node is in; 0: it is the outermost.
  package var depth: Int { Int(xml.xmlTextReaderDepth(reader)) }

  /// An error about what was read last.
  package func refuse(_ words: String) -> XMLError {
    .malformed("\(name), line \(xml.xmlTextReaderGetParserLineNumber(reader)): \(words)")
  }

  /// The next node; nil at the end. Throws `malformed` for what is no XML, or more of it than is
  /// wanted here.
  package func next() throws(XMLError) -> Node? {
    while true {
      switch xml.xmlTextReaderRead(reader) {
      case 0: return nil
      case 1: break
      default: throw refuse("this is not well-formed XML")
      }
      switch UInt32(xml.xmlTextReaderNodeType(reader)) {
      case XML_READER_TYPE_ELEMENT.rawValue:
        return .element(
          text(xml.xmlTextReaderConstLocalName(reader)) ?? "",
          namespace: text(xml.xmlTextReaderConstNamespaceUri(reader)))
      case XML_READER_TYPE_END_ELEMENT.rawValue:
        return .end(text(xml.xmlTextReaderConstLocalName(reader)) ?? "")
      case XML_READER_TYPE_TEXT.rawValue:
        return .text(text(xml.xmlTextReaderConstValue(reader)) ?? "")
      case XML_READER_TYPE_COMMENT.rawValue:
        return .comment(text(xml.xmlTextReaderConstValue(reader)) ?? "")
      case XML_READER_TYPE_DOCUMENT_TYPE.rawValue, XML_READER_TYPE_ENTITY_REFERENCE.rawValue:
        throw refuse("no document type and no entity is taken here")
      default: continue
      }
    }
  }

  private func text(_ pointer: UnsafePointer<xmlChar>?) -> String? {
    pointer.map { String(cString: $0) }
  }

  /// The value of an attribute of the current element; nil when it has none by that name.
  package func attribute(_ name: String) -> String? {
    guard let value = xml.xmlTextReaderGetAttribute(reader, name) else { return nil }
    defer { xmlFreeFunction(value) }
    return String(cString: value)
  }

  private func xmlFreeFunction(_ pointer: UnsafeMutablePointer<xmlChar>) {
    // libxml2's own name for it is a variable, which Swift 6 calls unsafe; it is free(3).
    free(pointer)
  }
}
